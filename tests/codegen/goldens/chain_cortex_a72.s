	fmov	v0.4s, #1.00000000
	movi	v1.4s, #64, lsl #24
	ldp	q2, q3, [x1]
	ldp	q4, q5, [x1, #32]
	ldp	q6, q7, [x1, #64]
	ldp	q16, q17, [x1, #96]
	fadd	v18.4s, v2.4s, v0.4s
	fmla	v2.4s, v1.4s, v18.4s
	fadd	v18.4s, v3.4s, v0.4s
	fmla	v3.4s, v1.4s, v18.4s
	fadd	v18.4s, v4.4s, v0.4s
	fmla	v4.4s, v1.4s, v18.4s
	fadd	v18.4s, v5.4s, v0.4s
	fmla	v5.4s, v1.4s, v18.4s
	fadd	v18.4s, v6.4s, v0.4s
	fmla	v6.4s, v1.4s, v18.4s
	fadd	v18.4s, v7.4s, v0.4s
	fmla	v7.4s, v1.4s, v18.4s
	fadd	v18.4s, v16.4s, v0.4s
	stp	q2, q3, [x2]
	fadd	v2.4s, v17.4s, v0.4s
	fmla	v16.4s, v1.4s, v18.4s
	fmla	v17.4s, v1.4s, v2.4s
	ldp	q2, q3, [x1, #128]
	stp	q4, q5, [x2, #32]
	fadd	v4.4s, v2.4s, v0.4s
	fmla	v2.4s, v1.4s, v4.4s
	stp	q6, q7, [x2, #64]
	stp	q16, q17, [x2, #96]
	fadd	v4.4s, v3.4s, v0.4s
	fmla	v3.4s, v1.4s, v4.4s
	stp	q2, q3, [x2, #128]
	ldp	q2, q3, [x1, #160]
	fadd	v4.4s, v2.4s, v0.4s
	fmla	v2.4s, v1.4s, v4.4s
	fadd	v4.4s, v3.4s, v0.4s
	fmla	v3.4s, v1.4s, v4.4s
	stp	q2, q3, [x2, #160]
	ldp	q2, q3, [x1, #192]
	fadd	v4.4s, v2.4s, v0.4s
	fmla	v2.4s, v1.4s, v4.4s
	fadd	v4.4s, v3.4s, v0.4s
	fmla	v3.4s, v1.4s, v4.4s
	stp	q2, q3, [x2, #192]
	ldp	q2, q3, [x1, #224]
	fadd	v4.4s, v2.4s, v0.4s
	fmla	v2.4s, v1.4s, v4.4s
	fadd	v0.4s, v3.4s, v0.4s
	fmla	v3.4s, v1.4s, v0.4s
	stp	q2, q3, [x2, #224]
	mov	w0, wzr
	ret
