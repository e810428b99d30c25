"""`pds-ray evaluate` as a Ray job.

    ray job submit --working-dir . -- python jobs/evaluate.py SET --config evaluation.yaml ...

SET is a run folder or a distilled set where the cluster finds it.
"""

import sys

from pds_ray.cli.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
