"""Installation of the library and of the command aligned-reid: `pip install .`"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "aligned_reid" / "__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None

setup(
    name="aligned_reid",
    version=VERSION[1],
    description="AlignedReID: training and evaluation of person re-identification on Ascend NPUs, GPUs and CPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["aligned_reid", "aligned_reid.*"]),
    package_data={"aligned_reid": ["py.typed", "inference/templates/*"]},
    entry_points={"console_scripts": ["aligned-reid = aligned_reid.commands:main"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.1",
        "torchvision>=0.16",
        "numpy>=1.24",
        "scipy>=1.10",
        "numba>=0.59",
        "h5py>=3.8",
        "opencv-python-headless>=4.8",
        "pillow>=9.1",
        "safetensors>=0.4",
        "simplejpeg>=1.7",
        "tensorboardX>=2.6",
        "tqdm>=4.65",
        "jinja2>=3.0",
    ],
    extras_require={"report": ["matplotlib>=3.6"], "export": ["onnx>=1.15", "onnxruntime>=1.16", "onnxscript>=0.1"]},
)
