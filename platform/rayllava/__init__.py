"""RayLLaVA: train, convert, evaluate and serve LLaVA-style vision-language models on Ray."""
