"""The embedding stage alone as a Ray job.

    ray job submit --working-dir . -- python jobs/embed.py --config run.yaml ...

`jobs/distill.py` with the same options does the rest.
"""

import sys

from pds_ray.cli.main import main

if __name__ == "__main__":
    main(["distill", "--only", "embed", *sys.argv[1:]])
