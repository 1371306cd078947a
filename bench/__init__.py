"""What measures this project: tables and timings. Nothing here is part of the library."""

from aft.clip.matmul import use_onednn

use_onednn()  # every program of this folder multiplies as train.py and eval.py do
