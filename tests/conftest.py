import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside several ranks on few cores
