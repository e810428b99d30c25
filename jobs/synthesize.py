"""The pictures alone as a Ray job, from prototypes that are there: python jobs/synthesize.py --config run.yaml ...

`jobs/distill.py` with the same options, up to `--only embed,prune,cluster,match,prototypes`, makes the prototypes.
"""

import sys

from pds_ray.cli import main

if __name__ == "__main__":
    main(["distill", "--only", "decode", *sys.argv[1:]])
