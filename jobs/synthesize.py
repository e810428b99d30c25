"""The images alone as a Ray job, from existing prototypes.

    ray job submit --working-dir . -- python jobs/synthesize.py --config run.yaml ...

`jobs/distill.py` with the same options and `--only embed,prune,cluster,match,prototypes` makes the
prototypes.
"""

import sys

from pds_ray.cli.main import main

if __name__ == "__main__":
    main(["distill", "--only", "decode", *sys.argv[1:]])
