"""Where things run. Ray reads its settings when it is imported, hence what is set here."""

import os

# a task that eats its machine's memory is killed and tried again: so often, where Ray's default is for ever
os.environ.setdefault("RAY_task_oom_retries", "3")
