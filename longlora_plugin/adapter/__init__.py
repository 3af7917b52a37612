"""What trains, with which precision, and how its weights are gathered, saved and loaded."""
