"""The benchmarks of airspeed velocity (asv), which imports every module of this directory for each commit."""
