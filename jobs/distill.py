"""`pds-ray distill` as a Ray job.

ray job submit --working-dir . -- python jobs/distill.py --config run.yaml ...
"""

import sys

from pds_ray.cli.main import main

if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
