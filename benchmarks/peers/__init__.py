"""The same updates through this library and through Flower, NVFlare, Fed-BioMed and DecLearn, in one run."""

from benchmarks.peers.compare import measure, tables

__all__ = ["measure", "tables"]
