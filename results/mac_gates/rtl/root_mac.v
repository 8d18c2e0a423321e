// Power-of-root multiply-accumulate: weight +-2^(-k/ROOT), code = {sign, k}; k all ones means zero.
// ROOT = 1 is POT, ROOT = 2 is POST with dual accumulators. Exponents of one residue k mod ROOT share
// an accumulator, in which every weight is a power of two: 2^(S - floor(k/ROOT)). Exact; the bank of
// residue j is multiplied by 2^(-j/ROOT) once an output, outside.
// Lossless accumulators: W = B_A + S + 1 + ceil(log2 N), S = floor((2^(B_W-1) - 2) / ROOT).
module root_mac #(
    parameter B_A = 8, parameter B_W = 4, parameter ROOT = 2, parameter N = 576,
    parameter S = ((1 << (B_W - 1)) - 2) / ROOT,
    parameter W = B_A + S + 1 + $clog2(N)
) (
    input               clk,
    input               clear,
    input  [B_A-1:0]    a,
    input  [B_W-1:0]    code,
    output [W*ROOT-1:0] acc
);
    localparam P = B_A + S;
    localparam ST = (S > 0) ? $clog2(S + 1) : 1;
    wire [B_W-2:0] k = code[B_W-2:0];
    wire is_zero = &k;
    wire negative = code[B_W-1] & ~is_zero;
    localparam R = (ROOT > 1) ? $clog2(ROOT) : 1;
    wire [R-1:0] residue;
    wire [ST-1:0] places;
    wire [R*(1<<(B_W-1))-1:0] residues;
    wire [ST*(1<<(B_W-1))-1:0] shifts;
    genvar i;
    generate  // of the exponent; the last entry is the weight zero, shift and bank are free
        for (i = 0; i < (1 << (B_W - 1)); i = i + 1) begin : exponent
            assign residues[R*i +: R] = i % ROOT;
            assign shifts[ST*i +: ST] = (i / ROOT > S) ? 0 : S - i / ROOT;
        end
    endgenerate
    pick #(.COUNT(1 << (B_W - 1)), .WIDTH(R)) bank_of (.words(residues), .index(k), .word(residue));
    pick #(.COUNT(1 << (B_W - 1)), .WIDTH(ST)) shift_of (.words(shifts), .index(k), .word(places));
    wire [P-1:0] gated = {{S{1'b0}}, a & {B_A{~is_zero}}};
    wire [P-1:0] magnitude = gated << places;
    wire [W-1:0] base;
    generate
        if (ROOT == 1) assign base = acc;
        else pick #(.COUNT(ROOT), .WIDTH(W)) read (.words(acc), .index(residue), .word(base));
    endgenerate
    wire [W-1:0] sum;
    ripple_add #(.WIDTH(W)) add (
        .x(base), .y({W{negative}} ^ {{(W - P){1'b0}}, magnitude}), .carry_in(negative),
        .sum(sum), .carry_out());
    genvar j;
    generate
        for (j = 0; j < ROOT; j = j + 1) begin : bank
            reg [W-1:0] value;
            always @(posedge clk or posedge clear)
                if (clear) value <= 0;
                else if (residue == j) value <= sum;
            assign acc[W*j +: W] = value;
        end
    endgenerate
endmodule
