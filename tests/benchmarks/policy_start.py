"""joint_darts_faa.py, all its flags, with a policy that starts differently.

    python tests/benchmarks/policy_start.py --eta 0.2 --preset quick     # another temperature of Eq. 3
    python tests/benchmarks/policy_start.py --even --preset quick        # every operation as likely as any other
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import joint_darts_faa as joint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--eta", type=float, default=0.05)
    parser.add_argument("--even", action="store_true")
    mine, flags = parser.parse_known_args()

    class Start(joint.Policy):
        def __init__(self, sub_policies: int = 10, stages: int = 2, eta: float = mine.eta):
            super().__init__(sub_policies, stages, eta)
            if mine.even:
                torch.nn.init.zeros_(self.z)

    joint.Policy = Start
    return joint.main(flags)


if __name__ == "__main__":
    sys.exit(main())
