"""`python -m benchmarks [NAME]`: run one measurement, or all of them."""

import argparse

from benchmarks import generation, lora_step, many_adapters, prompts

MEASUREMENTS = {
    "lora_step": lora_step.main,
    "many_adapters": many_adapters.main,
    "generation": generation.main,
    "prompts": prompts.main,
}

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("name", nargs="?", choices=sorted(MEASUREMENTS), help="which; all by default")
parser.add_argument("--rounds", type=int, default=3, help="how often each contender runs, in turn")
arguments = parser.parse_args()
for name, measure in MEASUREMENTS.items():
    if arguments.name in (None, name):
        measure(arguments.rounds)
