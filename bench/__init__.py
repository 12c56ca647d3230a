"""Speed, memory and error of `fusedattn` beside other libraries; start at `bench.run`."""
