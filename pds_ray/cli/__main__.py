"""Entry of `python -m pds_ray.cli`."""

from pds_ray.cli.main import main

if __name__ == "__main__":
    main()
