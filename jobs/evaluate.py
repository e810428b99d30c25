"""`pds-ray evaluate` as a Ray job: ray job submit --working-dir . -- python jobs/evaluate.py --config run.yaml ..."""

import sys

from pds_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
