"""Scheduling: schedules, and the scheduler that sets keep counts from them."""
