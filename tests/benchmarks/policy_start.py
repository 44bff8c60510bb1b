"""joint_darts_faa.py, all its flags, with a policy that starts differently.

    python tests/benchmarks/policy_start.py --eta 0.2 --preset quick     # another temperature of Eq. 3
    python tests/benchmarks/policy_start.py --even --preset quick        # every operation as likely as any other
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import joint_darts_faa as joint
from known_answer_joint import EvenStart


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--eta", type=float, default=0.05)
    parser.add_argument("--even", action="store_true")
    mine, flags = parser.parse_known_args()

    joint.Policy = partial(EvenStart if mine.even else joint.Policy, eta=mine.eta)
    return joint.main(flags)


if __name__ == "__main__":
    sys.exit(main())
