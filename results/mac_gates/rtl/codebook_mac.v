// Codebook multiply-accumulate (ADQ): the code looks up a two's-complement level word of L bits,
// which a uniform multiplier takes. LEVELS packs the words, code 0 lowest; they are wired in (ROM).
// Lossless accumulator: W = B_A + L + ceil(log2 N).
module codebook_mac #(
    parameter B_A = 8, parameter B_W = 4, parameter L = 8, parameter N = 576,
    parameter [L*(1<<B_W)-1:0] LEVELS = 0,
    parameter W = B_A + L + $clog2(N)
) (
    input            clk,
    input            clear,
    input  [B_A-1:0] a,
    input  [B_W-1:0] code,
    output [W-1:0]   acc
);
    wire [L-1:0] word;
    pick #(.COUNT(1 << B_W), .WIDTH(L)) level (.words(LEVELS), .index(code), .word(word));
    uniform_mac #(.B_A(B_A), .B_W(L), .N(N)) mac (
        .clk(clk), .clear(clear), .a(a), .code(word), .acc(acc));
endmodule
