# Importing the extension registers torch.ops.resnet_fused; the module itself is empty.
