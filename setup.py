"""What pyproject.toml cannot say: configs/, which users edit where it lies, is installed as kuavo_train/configs."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["kuavo_train*", "kuavo_sim*", "kuavo_client", "lerobot_policy_*"]),
        "kuavo_train.configs",
    ],
    py_modules=["lerobot_policy_kuavo_train"],
    package_dir={"kuavo_train.configs": "configs"},
    package_data={
        "": ["py.typed"],
        "kuavo_train.configs": ["**/*.yaml"],
        "kuavo_train.reporting": ["templates/*"],
    },
)
