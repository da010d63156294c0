"""The privacy gate: does a change of code make a defence leak more than its stored baseline?"""
