"""RayLLaVA: train, convert, evaluate and serve LLaVA-style vision-language models on Ray."""

from importlib.metadata import version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, for manifests and reports."""
    packages = ("torch", "ray", "transformers", "deepspeed", "bitsandbytes")
    return {"rayllava": __version__, **{name: version(name) for name in packages}}
