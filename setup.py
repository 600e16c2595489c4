from configparser import ConfigParser
from setuptools import find_packages, setup

config = ConfigParser()
config.read("settings.ini")
lines = lambda text: [line for line in text.splitlines() if line]
setup(
    install_requires=lines(config["requirements"]["install"]),
    extras_require={name: lines(value) for name, value in config["extras"].items()},
    packages=[*find_packages(include=["llmops_kit*"]), "llmops_kit.jobs"],
    package_dir={"llmops_kit.jobs": "nbs/jobs"},  # the jobs travel in the wheel without a second copy
    package_data={"llmops_kit.jobs": ["*.ipynb"], "llmops_kit.models": ["tiny/*", "tiny_run/*"], "llmops_kit.data": ["templates/*.md"],
                  "llmops_kit.evaluation": ["probes/*.jsonl", "tasks/*.yaml"]},
)
