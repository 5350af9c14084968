"""`python -m benchmarks [NAME]`: run one measurement, or all of them."""

import argparse

from benchmarks import generation, hosts, lora_step, many_adapters, methods, prompts

MEASUREMENTS = {
    "lora_step": lora_step.main,
    "many_adapters": many_adapters.main,
    "generation": generation.main,
    "prompts": prompts.main,
    "methods": methods.main,
    "hosts": hosts.main,
}
# These need environments of their own, see the Makefile: they are run by name alone.
BY_NAME = {"hosts"}

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("name", nargs="?", choices=sorted(MEASUREMENTS), help="which; all by default")
parser.add_argument("--rounds", type=int, default=3, help="how often each contender runs, in turn")
arguments = parser.parse_args()
for name, measure in MEASUREMENTS.items():
    if arguments.name == name or (arguments.name is None and name not in BY_NAME):
        measure(arguments.rounds)
