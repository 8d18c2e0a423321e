// N2UQ: binary search among 2^B - 1 sorted thresholds, one comparison of W bits a clock, B clocks.
// The thresholds lie in a memory outside; address says which one comes in next.
module threshold_search #(parameter W = 20, parameter B = 4) (
    input              clk,
    input              clear,
    input  [W-1:0]     x,
    input  [W-1:0]     threshold,
    output reg [B-1:0] code,
    output [B-1:0]     address
);
    reg [B-1:0] step;
    assign address = code | step;
    // x > threshold, signed: flip the sign bits, then the carry out of x + ~threshold
    wire is_above;
    wire [W-1:0] flip = {1'b1, {(W-1){1'b0}}};
    ripple_add #(.WIDTH(W)) compare (
        .x(x ^ flip), .y(~(threshold ^ flip)), .carry_in(1'b0), .sum(), .carry_out(is_above));
    always @(posedge clk or posedge clear)
        if (clear) begin
            code <= 0;
            step <= 1 << (B - 1);
        end else begin
            if (is_above) code <= address;
            step <= step >> 1;
        end
endmodule
