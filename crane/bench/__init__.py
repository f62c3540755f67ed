"""`crane bench`: engines and servers, alone or beside others in turns."""

# between the turns of two: OpenMP's threads look for work for 0.2 s before they sleep, on the next one's cores
SETTLE_S = 0.5
