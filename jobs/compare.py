"""`pds-ray compare` as a Ray job.

ray job submit --working-dir . -- python jobs/compare.py --config run.yaml ...
"""

import sys

from pds_ray.cli.main import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
