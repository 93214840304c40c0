"""A model of step time and memory per rank from 1 to 4,096 ranks, and the measurements it is calibrated on."""
