"""Lets `python -m pds_ray.cli` run the command line."""

from pds_ray.cli.main import main

if __name__ == "__main__":
    main()
