"""What connects the core to other projects' models, tokenizers, file formats and evaluators."""
