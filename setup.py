"""What pyproject.toml cannot say: configs/, which users edit where it lies, is installed as kuavo_train/configs, and
models/, what simulated runs start from, as kuavo_train/models.
"""

from setuptools import find_packages, setup

FOLDERS = ("configs", "models")

setup(
    packages=[
        *find_packages(include=["kuavo_train*", "kuavo_sim*", "kuavo_client", "lerobot_policy_*"]),
        *(f"kuavo_train.{folder}" for folder in FOLDERS),
    ],
    py_modules=["lerobot_policy_kuavo_train"],
    package_dir={f"kuavo_train.{folder}": folder for folder in FOLDERS},
    package_data={
        "": ["py.typed"],
        "kuavo_train.configs": ["**/*.yaml"],
        "kuavo_train.models": ["**/*"],
        "kuavo_train.reporting": ["templates/*"],
    },
)
