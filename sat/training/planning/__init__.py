"""What a run will need and how long a step will take, before any machine is rented: `train_video.py --plan`."""
