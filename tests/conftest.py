import torch

torch.set_num_threads(1)  # the tests are small: more threads would only wait for each other
