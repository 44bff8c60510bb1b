"""joint_darts_faa.py, all its flags, with a policy that starts differently.

    python tests/benchmarks/policy_start.py --eta 0.2 --preset quick     # another temperature of Eq. 3
    python tests/benchmarks/policy_start.py --even --preset quick        # every operation as likely as any other
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import joint_darts_faa as joint
from known_answer_joint import EvenStart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--eta", type=float, default=joint.ETA)
    parser.add_argument("--even", action="store_true")
    mine, flags = parser.parse_known_args()

    joint.ETA = mine.eta
    if mine.even:
        joint.Policy = EvenStart
    joint.main(flags)


if __name__ == "__main__":
    main()
