// Array multiplier: unsigned a times two's-complement b, exact in A_BITS + B_BITS bits.
// One ripple row a bit of b; the row of b's sign bit is subtracted.
module array_multiply #(parameter A_BITS = 8, parameter B_BITS = 8) (
    input  [A_BITS-1:0]        a,
    input  [B_BITS-1:0]        b,
    output [A_BITS+B_BITS-1:0] product
);
    wire [A_BITS-1:0] upper [0:B_BITS-2];
    wire [A_BITS-1:0] first = a & {A_BITS{b[0]}};
    assign product[0] = first[0];
    assign upper[0] = first >> 1;
    genvar j;
    generate
        for (j = 1; j < B_BITS - 1; j = j + 1) begin : row
            wire [A_BITS-1:0] sum;
            wire carry;
            ripple_add #(.WIDTH(A_BITS)) add (
                .x(upper[j-1]), .y(a & {A_BITS{b[j]}}), .carry_in(1'b0),
                .sum(sum), .carry_out(carry));
            assign product[j] = sum[0];
            if (A_BITS > 1) assign upper[j] = {carry, sum[A_BITS-1:1]};
            else assign upper[j] = carry;
        end
    endgenerate
    wire carry_last;
    ripple_add #(.WIDTH(A_BITS)) subtract (
        .x(upper[B_BITS-2]), .y(~(a & {A_BITS{b[B_BITS-1]}})), .carry_in(1'b1),
        .sum(product[B_BITS-1 +: A_BITS]), .carry_out(carry_last));
    assign product[A_BITS+B_BITS-1] = ~carry_last;
endmodule
