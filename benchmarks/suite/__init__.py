"""What airspeed velocity measures. Alone in this directory: for each commit asv imports all modules that it holds."""
