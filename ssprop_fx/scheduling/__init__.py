"""Scheduling: schedules, and the scheduler that moves keep counts by them."""
