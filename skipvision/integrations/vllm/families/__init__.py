"""One module for each model family. vLLM imports a module when it loads a model of that family."""
