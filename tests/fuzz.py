"""The properties of test_fuzz.py for as long as one likes: ``python tests/fuzz.py [--seconds 600] [NAME ...]``.

Each round draws anew; what fails is shrunk and printed with the line that repeats it.
"""

import argparse
import time

import conftest
import hypothesis


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="in all (default: 600)")
    parser.add_argument("names", nargs="*", help="parts of the properties' names; all without")
    options = parser.parse_args()
    conftest.pytest_configure()
    hypothesis.settings.register_profile("long", max_examples=100, deadline=None, database=None, print_blob=True)
    hypothesis.settings.load_profile("long")
    import test_fuzz  # now, for the properties take their settings from the profile

    chosen = [p for p in test_fuzz.PROPERTIES if not options.names or any(n in p.__name__ for n in options.names)]
    if not chosen:
        parser.error(f"no property has {options.names} in its name")
    end, rounds = time.monotonic() + options.seconds, 0
    while time.monotonic() < end:
        chosen[rounds % len(chosen)]()
        rounds += 1
    print(f"{rounds} rounds of up to 100 examples, none failed")


if __name__ == "__main__":
    main()
