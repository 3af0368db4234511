"""What every gRPC server needs to run well: address, calls, streams, errors, health, draining."""
