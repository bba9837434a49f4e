"""Threads: the pool, parallel regions, teams with barriers and work stealing, rows split over threads."""
