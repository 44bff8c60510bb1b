"""dha.py, every batch drawn from all images, as Eq. (3) needs them, also where it is not learned. Flags are dha.py's.

Beside dha.py --no-hpo, which goes through the images in turn, it says what these batches cost by themselves.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import common
import dha

batch_indices = common.batch_indices


def independent_batches(count: int, batch_size: int, seed: int, rank: int, world: int, independent: bool = False):
    return batch_indices(count, batch_size, seed, rank, world, independent=True)


if __name__ == "__main__":
    common.batch_indices = independent_batches
    dha.main(sys.argv[1:])
