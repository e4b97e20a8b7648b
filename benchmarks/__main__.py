"""`python -m benchmarks NAME [options]`: the measurements of this project; see NAMES."""

import sys
from importlib import import_module

NAMES = ("masking", "homomorphic", "graph", "noise", "recipe", "transport", "utility", "dicom", "xray", "chaos")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python -m benchmarks {{{','.join(NAMES)}}} [--help]")
    name = sys.argv.pop(1)
    sys.argv[0] = f"python -m benchmarks {name}"
    import_module(f"benchmarks.{name}").main()
