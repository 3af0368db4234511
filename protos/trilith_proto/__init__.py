"""The wire contract: .proto files with their generated stubs beside them (make proto)."""
