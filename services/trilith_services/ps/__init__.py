"""The parameter server: servicer, store, tables, kernels, and what keeps them alive."""
