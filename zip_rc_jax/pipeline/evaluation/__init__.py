"""The parts of an evaluation: decodes, pools, predictions, drift, and the stages that join them."""
