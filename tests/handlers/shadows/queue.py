OURS = "the queue of the model"
