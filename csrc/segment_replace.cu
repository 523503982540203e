__global__ void placeholder() {}
