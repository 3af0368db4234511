"""How good trained models are: minutes of training, hence apart from `make test`."""
